"""A zoo of small models, each with the Hessian products it must have."""
