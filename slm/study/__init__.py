"""Studies of what the other rooms can do: they import everything, and nothing imports them."""
