"""From a model's config.json and a server's flags to a commented spec."""
