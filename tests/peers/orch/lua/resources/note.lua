return { uri = "peer://note", name = "note", text = "a note" }
