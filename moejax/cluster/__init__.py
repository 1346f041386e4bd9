"""Several processes that train one model: start together, agree, notice that one is gone."""
