"""Recipes: whole jobs as functions. A recipe tells a story on one screen; its parts live in the layers below."""
