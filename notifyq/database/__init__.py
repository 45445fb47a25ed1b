"""The database: how to reach it, its schema and its upgrades. The statements are in sql/, by the wing that runs them.

dsn, hosts              what a DSN says, and which servers it leads to
connection, reconnect   connections; another one after each failure
errors                  PostgreSQL's errors as notifyq's, with the cure
schema, upgrade         which schema this code needs, and the way to it
"""
