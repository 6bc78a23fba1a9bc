"""`python -m roma.integrations.swift`: prints the path for `swift rlhf --external_plugins`."""

from roma.integrations.swift import plugin_path

if __name__ == "__main__":
    print(plugin_path())
