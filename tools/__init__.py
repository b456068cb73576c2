"""blockcache.tools: the command line, the demo, benchmarks and plots."""
