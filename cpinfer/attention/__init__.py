"""The subject: attention over sharded KV. `layer`: one layer; `steps`, `context`: a step; `exchange`: over ranks."""
