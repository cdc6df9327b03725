"""Every measured figure of the pages: numbers, tables and pictures, written from the committed results."""
