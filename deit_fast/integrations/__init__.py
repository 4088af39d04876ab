"""Where deit_fast meets other libraries; each module needs its library only when it is used."""
