"""The verbs' work: what joins the parts for one job. ``api`` names them, ``cli`` calls them."""
