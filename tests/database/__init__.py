"""schema.sql, the statements of notifyq/database/sql, roles, DSNs and upgrades."""
