"""How each picture is drawn, by what it shows; eval/plots.py lists them and writes the files."""
