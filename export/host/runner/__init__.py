"""The runner in Python: one process that loads a bundle, answers a request and reports how.

`python -m export.host.runner REQUEST_FILE` leaves events.jsonl and result.json beside the request,
as docs/runner.md says. Who writes the request and reads the rest is not known here. Begin with
`run`.
"""
