"""The diagnosis: from costs to what is lacking, to the patch that helps, as a page."""
