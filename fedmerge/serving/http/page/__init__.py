"""``fedmerge serve --page``: a page on which a person puts a history together and sees what each model recommends."""
