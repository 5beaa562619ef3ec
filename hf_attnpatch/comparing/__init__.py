"""The parts of ``compare``: measurements that are kept, tables, figures, pages."""
