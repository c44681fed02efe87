"""Phantoms: synthetic twins of the data sets, in the same layout and value ranges.

Each has a module of its name with ``make_phantom``, which writes the files and prepares them.
"""

PHANTOMS = {
    "left_atrium": "Synthetic chest volumes with a left atrium, in LASC18's layout.",
    "brain": "Synthetic brain MR slices with a FLAIR abnormality, in kaggle_3m's layout.",
    "polyp": "Synthetic colonoscopy frames with a polyp, in CVC-ClinicDB's layout.",
    "em": "Synthetic ssTEM sections of cells with dark membranes, in the ISBI 2012 challenge's layout.",
}
