"""Connections, the schema and its upgrades. The statements are in sql/, by the wing that runs them."""
