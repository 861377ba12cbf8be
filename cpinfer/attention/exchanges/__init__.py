"""How partial attention over KV shards becomes whole: `base` is the contract, each exchange a file and a row."""
