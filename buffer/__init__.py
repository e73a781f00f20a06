"""The contract and the store: records, tables, weights and the HTTP client that actors and learners import."""
