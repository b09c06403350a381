"""The operations a model is made of. `ops` is what the rest of Minga calls; `reference` is what each of them means."""
