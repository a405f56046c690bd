"""The registry: MLflow runs, adapter versions, aliases, and the tracking server. The only `import mlflow`."""
