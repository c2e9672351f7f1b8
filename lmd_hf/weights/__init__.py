"""Where matrices come from: names, files, stored formats; no linear algebra."""
