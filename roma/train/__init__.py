"""The trainer: collect, update, log, save. `roma.train.trainer` is read from top to bottom."""
