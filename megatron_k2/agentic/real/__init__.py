"""Real tools: MCP servers and code, in the sandbox, with evidence of what they did."""
