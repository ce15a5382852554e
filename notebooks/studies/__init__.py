"""What the five notebooks ask, how every shipped file is made, and the protocol of the reports."""
