"""What the host machine offers: paths, set-up of runsc, doctor, cgroups, namespaces."""
