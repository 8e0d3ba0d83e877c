"""How close an embedding came: figures and pictures on noise and in sentences never learnt from."""
