"""Result rows to committed files, and the records of runs. Knows no images and no Ray."""
