"""Servers of the Model Context Protocol (MCP), whose tools a model can call."""
