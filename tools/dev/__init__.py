"""Scripts for those who work on blockcache."""
