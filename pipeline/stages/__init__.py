"""One module per DVC stage; each main() reads params.yaml and the files named in its docstring."""
