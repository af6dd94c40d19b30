"""What people and their programs meet: the client, the command line, how things look; all over the socket."""
