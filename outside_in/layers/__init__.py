"""What model.py is made of: attention, norms, dropout, and their forms for each kind of device."""
