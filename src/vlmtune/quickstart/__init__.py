"""The whole life offline: tasks and the model they start from."""
