"""What tools/compare.py is made of: layouts by name, launches, agreement, tables, pictures, the report."""
