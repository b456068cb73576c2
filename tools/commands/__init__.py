"""One file a subcommand: parse, call one public function, print."""
