"""MergeRec and AdaMerging learn merging coefficients from catalogs.

To be read in this order:

    pseudo_users  token sequences made from a catalog, with the vectors of the domain's expert: the teacher
    vectors       what the coefficients multiply, and the backbone's forward pass under them: the student
    objective     settings, loss terms and the loss
    coefficients  where coefficients start, and Adam over them
    learn         all of it together, for a process that has the catalogs
    cohort        the name of a set of experts whose coefficients are learned through the clients
    variants      the variants that an experiment asks for
    pictures      pictures of a learned merge
"""
