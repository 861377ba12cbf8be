"""What `cpinfer compare` is made of: layouts by name, launches, agreement, tables, pictures, the report."""
