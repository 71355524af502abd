"""What simulated engines and stores share: profiles, links, and the transport between them."""
