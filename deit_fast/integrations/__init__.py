"""Integrations with other libraries; a module needs its library only when it is used."""
