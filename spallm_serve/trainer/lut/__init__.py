"""SpaLLM: the codes stay, the tables are trained."""
