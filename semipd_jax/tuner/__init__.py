"""How compute is divided between the phases: targets, predictions, decisions. Pure, host only."""
