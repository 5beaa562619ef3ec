"""Stock model types that hold a model's weights exactly and can say more than its own type can.

Whether such a *home* fits is tried, never assumed: the model is built again as the home's class around the very same
parameters, and must give the same bits (:mod:`.fitting`). What each home can say stands in :mod:`.rows`.
"""
