"""What is made to match. Each objective maps vectors to one scalar loss by the same call (`base.Objective`)."""
