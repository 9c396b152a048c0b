"""An experiment for domain folders, with budgets for this machine."""
