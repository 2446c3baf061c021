"""Files of models: found, checked and digested before a model is made of them."""
