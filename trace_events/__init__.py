"""Room 0: tracepoints, the event stream with its causes, and the trace file formats.

Map:

| file | subject |
|---|---|
| `tracepoint.py` | `Tracepoint`: one event's name, fields and print format, declared beside what fires it |
| `event.py` | `Event`: one fired tracepoint |
| `stream.py` | `TraceStream`: numbering, binding, causes, listeners |
| `filters.py` | event globs and trace-cmd's `-F` field filters |
| `ndjson.py` | the trace file: header, events, end line |
| `text.py` | trace-cmd's report line |

Everything above imports this room; it imports nothing of ours.
"""
