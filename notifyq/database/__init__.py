"""The database: how to reach it, its schema and its upgrades. The statements are in sql/, by the wing that runs them.

dsn, hosts              what a DSN says, and which servers it leads to
connection, reconnect   connections, and how to go on after one fails
errors                  PostgreSQL's errors, translated into notifyq's, with the cure
schema, upgrade         which schema this code needs, and the way to it
"""
