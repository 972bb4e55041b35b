"""What several subcommands share: arguments, output, errors, the environment."""
