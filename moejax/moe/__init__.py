"""Mixture-of-Experts: who goes where (routing), how evenly (balance), the transport (dispatch)."""
