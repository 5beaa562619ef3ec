"""From a cost to a lack, to the patch that answers it, as a page."""
