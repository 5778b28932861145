def main(arguments):
    return "later"
